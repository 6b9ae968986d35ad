"""Corpus jobs: sources to scores, selection, tiles and WebDataset shards."""
