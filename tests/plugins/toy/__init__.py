"""What someone else's distribution may bring: a mixer, a gate and a dispatcher, each in one file."""
