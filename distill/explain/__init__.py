"""Why a model answered as it did: what modalities contribute, what in an input counts, what attention reads.

Pictures of one row at a time, drawn for several models side by side.
"""

from distill.explain.page import write_page
from distill.explain.subject import SCORE, Explained, Subject, explain_row

__all__ = ["SCORE", "Explained", "Subject", "explain_row", "write_page"]
