"""Gates: one file each, all from tokens x [T, H] to a `Routing`."""

from moesys.moe.gates.top_k import TopKGate as TopKGate
