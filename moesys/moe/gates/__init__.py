"""The arithmetic of gates: one file each, all from tokens x [T, H] to a `GateOutput`.

`moesys.models.parts.gates` describes each for a configuration, in the file of the same name: its keys, its weights,
and how it is built.
"""

from moesys.moe.gates.gate import Gate as Gate
from moesys.moe.gates.prototype import PrototypeGate as PrototypeGate
from moesys.moe.gates.top_k import TopKGate as TopKGate
