"""One module per export target, each naming its class in `TARGET`; `fedtune.export.target.targets` finds them."""
