"""One file per benchmark; whatever lies here and has a `BENCHMARK` is one."""
