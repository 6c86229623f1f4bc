"""``python -m distill``: what ``accelerate launch -m distill`` runs."""

from distill.cli import main

main()
