"""Gates: one file each, all from tokens x [T, H] to a `GateOutput`."""

from moesys.moe.gates.gate import Gate as Gate
from moesys.moe.gates.prototype import PrototypeGate as PrototypeGate
from moesys.moe.gates.top_k import TopKGate as TopKGate
