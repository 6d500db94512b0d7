"""Thin verbs: each file is one command."""
