"""The mask token is one that text never contains; the draft vocabulary is what the verifier says most."""

import pytest

from vllm_dflash.training.vocab import choose_draft_vocab, choose_mask_token


def tokenizer(special, *, size=100, mask=None, pad=2, template=""):

    class Token(str):
        special = True

    added = {i: Token(t) for i, t in special.items()}
    return type(
        "Tokenizer",
        (),
        {
            "bos_token_id": 0,
            "eos_token_id": 1,
            "unk_token_id": None,
            "pad_token_id": pad,
            "mask_token_id": mask,
            "added_tokens_decoder": added,
            "chat_template": template,
            "__len__": lambda self: size,
        },
    )()


def test_own_mask_token_wins():
    assert choose_mask_token(tokenizer({7: "<|reserved_1|>"}, mask=9), 100) == 9


def test_own_mask_token_that_is_the_pad_token_does_not():
    assert choose_mask_token(tokenizer({7: "<|reserved_1|>"}, mask=2), 100) == 7


def test_reserved_before_padding_rows_before_unused_special():
    names = {5: "<|im_start|>", 6: "<repo>", 7: "<|reserved_3|>"}
    assert choose_mask_token(tokenizer(names), 128) == 7
    del names[7]
    assert choose_mask_token(tokenizer(names), 128) == 100
    assert choose_mask_token(tokenizer(names, template="<|im_start|>{{x}}"), 100) == 6


def test_no_candidate_names_the_flag():
    with pytest.raises(ValueError, match="--mask-token-id"):
        choose_mask_token(tokenizer({5: "<a>"}, template="<a>"), 100)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_given_id_that_text_contains_is_refused(given):
    with pytest.raises(ValueError, match=f"--mask-token-id {given} "):
        choose_mask_token(tokenizer({}), 100, given=given)


def test_a_given_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        choose_mask_token(tokenizer({}), 100, given=100)
    assert choose_mask_token(tokenizer({}), 100, given=99) == 99


def test_draft_vocab_takes_the_most_frequent_then_prompts_then_low_ids():
    ids, covered = choose_draft_vocab([[9, 9, 8, 7], [9, 8]], [[30, 30, 9]], 4, 50, always=[1])
    assert ids == [1, 7, 8, 9]
    assert covered == 1.0
    ids, covered = choose_draft_vocab([[9, 9, 8, 7], [9, 8]], [[30, 30, 9]], 2, 50, always=[1])
    assert ids == [1, 9]
    assert covered == pytest.approx(3 / 6)
    assert choose_draft_vocab([[9]], [[30]], 5, 50)[0] == [0, 1, 2, 9, 30]


def test_draft_vocab_does_not_depend_on_the_order_of_the_data():
    data = [[4, 5, 6], [6, 5], [7, 8, 9]]
    assert choose_draft_vocab(data, [], 4, 20) == choose_draft_vocab(data[::-1], [], 4, 20)


@pytest.mark.parametrize("size", [0, 51])
def test_draft_vocab_size_is_checked(size):
    with pytest.raises(ValueError, match=f"--draft-vocab {size} "):
        choose_draft_vocab([[1]], [], size, 50)
