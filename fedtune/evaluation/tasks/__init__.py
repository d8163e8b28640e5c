"""The benchmarks: every module in this package that defines a `TASK` is one."""
