"""Experiments and cost measurements. Not part of the installed package."""
