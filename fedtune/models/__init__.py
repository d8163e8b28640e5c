"""Base model and adapter: find, load once, quantize, attach, read, write."""

import logging

_ADVICE = ("Failed to load CPU gemm_4bit_forward from kernels-community", "MatMul8bitLt: inputs will be cast")
"""bitsandbytes advises an optional package when it is imported, and tells of its int8 casts in every pass of every layer."""


def _is_no_advice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_ADVICE)


for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).addFilter(_is_no_advice)
