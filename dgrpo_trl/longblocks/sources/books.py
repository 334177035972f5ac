"""Institutional Books: the columns of its rows, and which transcription of a page is taken."""

from typing import Any


BOOK_COLUMNS = ("text_by_page_src", "text_by_page_gen", "ocr_score_src", "ocr_score_gen")


def book_pages(row: dict[str, Any]) -> list[str]:
    """The pages of a volume of Institutional Books, in the transcription that scored better.

    LongBlocks (arXiv:2605.12227) takes `text_by_page_src`, the original OCR, if `ocr_score_src >= ocr_score_gen`, else
    `text_by_page_gen`. Most languages have no second transcription: then it is the original.

    Args:
        row (`dict`):
            Row of `institutional/institutional-books-1.0`.

    Returns:
        `list[str]`: a missing page is empty.
    """
    scores = row.get("ocr_score_src"), row.get("ocr_score_gen")
    original, generated = row.get("text_by_page_src"), row.get("text_by_page_gen")
    is_original = not generated or scores[1] is None or (scores[0] is not None and scores[0] >= scores[1])
    return [page or "" for page in (original if is_original else generated) or []]
