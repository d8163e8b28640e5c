"""From a run to something that others can use."""
