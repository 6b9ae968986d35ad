"""Restoration by sampling: noise schedule, samplers, guidance, tiles, colour, pixels in and out."""
