"""Training: samples from shards in an order that is a function, and what is made of them."""

from .cache import Patience, ReadFailed
from .corpus import Corpus, CorpusError
from .foreign import index_foreign
from .reader import Reader, Reading, Sample, TooManyCorrupt

__all__ = ["Corpus", "CorpusError", "Patience", "ReadFailed", "Reader", "Reading", "Sample", "TooManyCorrupt",
           "index_foreign"]
