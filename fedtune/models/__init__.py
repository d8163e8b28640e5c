"""Base model and adapter: find, load once, quantize, attach, read, write."""

import logging

# bitsandbytes advises an optional package when it is imported, and tells of its int8 casts in every pass.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
