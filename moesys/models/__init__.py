"""Plain single-device models, and their sizes without building them."""

from moesys.models.decoder import Decoder as Decoder
