"""Parts of a model that describe themselves: keys, weights by named axes, FLOPs, kept memory; no torch is needed.

axes          named axes, weights and kept activations
part          the base of all parts
mixers/       kinds of attention, one file each
gates/        kinds of gates, one file each
feed_forward  dense feed-forwards, and shared experts
moe           MoE layers: gate, experts, mix
model         a whole model as a list of parts

`gate_rules`, `expert_rules`, `pattern_rules` and `rope_rules` hold the rules between keys of the model alone.
"""
