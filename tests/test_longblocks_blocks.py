"""Blocks: what holds for any text whatever, natural borders, and which blocks are related."""

import ast
import inspect
import random
import textwrap
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgrpo_trl.longblocks.blocks import Block, BlocksConfig, link_blocks, split_blocks


SMALL = BlocksConfig(min_block_chars=30, max_block_chars=80)
ANY_TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs",)),
        st.sampled_from("\n\n\r\u2028\u2029\x85\t .。!?#`~*=-אبا\U0001f600\x00def(:)"),
    ),
    max_size=400,
)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT, st.sampled_from(["text", "markdown", "code"]), st.booleans())
def test_every_character_is_in_one_block_at_its_offsets(document, kind, has_config):
    blocks = split_blocks(document, kind, SMALL if has_config else None)
    position = 0
    for block in blocks:
        assert document[block.start : block.end] == block.text == block.text.strip() != ""
        assert position <= block.start and not document[position : block.start].strip()
        assert not has_config or len(block.text) <= 80
        position = block.end
    assert not document[position:].strip()
    assert len({block.id for block in blocks}) == len(blocks)


@pytest.mark.parametrize("kind", ["text", "markdown", "code"])
def test_one_huge_line_is_cut(kind):
    document = "word " * 200_000
    started = time.perf_counter()
    blocks = split_blocks(document, kind, BlocksConfig())
    assert all(len(block.text) <= 2000 for block in blocks) and len(blocks) >= 500
    assert time.perf_counter() - started < 20  # quadratic work would take minutes


def test_an_edit_leaves_the_ids_of_what_is_elsewhere():
    paragraphs = [
        f"Paragraph {n} is about the thing number {n}, at some length, so that it stands alone." for n in range(20)
    ]
    before = {block.id for block in split_blocks("\n\n".join(paragraphs), "text", SMALL)}
    paragraphs[7] = "Something else stands here, which is about as long as what stood here before it."
    after = {block.id for block in split_blocks("\n\n".join(paragraphs), "text", SMALL)}
    assert 1 <= len(before - after) <= 2


def test_headings_stay_with_what_follows_and_fences_stay_whole():
    document = (
        "# One\n\nFirst paragraph of some length.\n\n## Two\n\n```\na\n\n# no heading\n\nb\n```\n\nLast paragraph."
    )
    texts = [block.text for block in split_blocks(document, "markdown", BlocksConfig(min_block_chars=0))]
    assert texts == [
        "# One\n\nFirst paragraph of some length.",
        "## Two\n\n```\na\n\n# no heading\n\nb\n```",
        "Last paragraph.",
    ]


def test_python_is_cut_between_statements():
    document = inspect.getsource(textwrap)
    blocks = split_blocks(document, "code", BlocksConfig(min_block_chars=0, max_block_chars=100_000))
    tree = ast.parse(document)
    assert len(blocks) == len(tree.body)
    for block in blocks:
        ast.parse(block.text)


def test_sentences_stay_whole_where_a_paragraph_is_cut():
    document = " ".join(f"Sentence number {n} is not so long." for n in range(30))
    assert all(block.text.endswith(".") for block in split_blocks(document, "text", SMALL))


def make_blocks(texts):
    return [Block(id=str(i), start=i * 1000, end=i * 1000 + len(text), text=text) for i, text in enumerate(texts)]


def test_blocks_that_share_rare_terms_are_linked_and_neighbours_are_not():
    texts = [f"plain filler sentence about weather number{i}" for i in range(20)]
    texts[2] = texts[15] = "the Brandwell lighthouse keeper Ottoline"
    texts[3] = "the Brandwell lighthouse keeper Ottoline"  # a neighbour of 2
    links = link_blocks(make_blocks(texts), BlocksConfig())
    assert links[2] == [15] and set(links[15]) == {2, 3} and links[8] == []


def test_japanese_blocks_are_linked_by_pairs_of_characters():
    texts = [f"天気についての普通の文章{chr(0x4E00 + i)}{chr(0x5E00 + i)}" for i in range(20)]
    texts[1], texts[12] = "灯台守の老人は霧笛を鳴らした", "霧笛を鳴らす灯台守の家"
    assert link_blocks(make_blocks(texts), BlocksConfig())[1] == [12]


def test_many_blocks_are_linked_in_time():
    rng = random.Random(0)
    words = [f"word{n}" for n in range(5000)]
    blocks = make_blocks([" ".join(rng.choices(words, k=100)) for _ in range(1500)])
    started = time.perf_counter()
    links = link_blocks(blocks, BlocksConfig())
    assert time.perf_counter() - started < 30 and all(len(link) <= 4 for link in links)


def test_sizes_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="`min_block_chars` is 100 and `max_block_chars` 50"):
        BlocksConfig(min_block_chars=100, max_block_chars=50)
