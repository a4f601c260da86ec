"""Parts of a model that describe themselves: keys, weights by named axes, FLOPs, kept memory; no torch is needed.

axes          named axes, weights and kept activations
part          the base of all parts
mixers/       kinds of attention, one file each
gates/        kinds of gates, one file each; their base is in `kind`, rules between their keys in `rules`
feed_forward  dense feed-forwards, and shared experts
moe           MoE layers: gate, experts, mix
model         a whole model as a list of parts

`expert_rules`, `pattern_rules` and `rope_rules` hold the rules between other keys of the model alone.
"""
