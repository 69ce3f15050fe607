"""Encoding text in bulk: batches by tokens, pooled vectors in the order of the texts, files of any size.

`rewire.encode` works with any encoder; one that a plan has packed (`Pack`) runs on its real tokens alone.
"""

from rewire.fastpath.encode import encode, encode_stream
from rewire.fastpath.files import EncodedFile, encode_file
from rewire.fastpath.pooling import POOLINGS, Pooling

__all__ = ["encode", "encode_stream", "encode_file", "EncodedFile", "Pooling", "POOLINGS"]
