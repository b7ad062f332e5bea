"""`python -m cai`: the same as the command `cai`."""

from cai.cli import main

main(prog_name="cai")
