"""Comparisons that decided what the library does."""
