"""The commands, as functions `main(arguments)`: the files of `scripts/` call them."""
