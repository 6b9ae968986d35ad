"""Captions: the questions that models are asked, and what becomes of their answers."""
