"""Reports of runs: one self-contained HTML file each, and tables for the terminal."""
