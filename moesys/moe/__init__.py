"""The MoE layer on one device: gate → dispatch → experts → combine. Needs torch alone."""

from moesys.moe.layer import MoELayer as MoELayer
from moesys.moe.routing import Routing as Routing
from moesys.moe.routing import Tokens as Tokens
