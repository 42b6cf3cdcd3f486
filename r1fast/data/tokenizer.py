"""A small byte-level BPE tokenizer for a model from scratch, with the special tokens of the released R1 models."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from r1fast.data.chat_templates import chat_template
from r1fast.data.templates import ASSISTANT, BOS, EOS, USER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# In the text of a response, so not "special": decoding keeps them.
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "|special_token|")
# Operators with their spaces, numbers of up to three digits (as DeepSeek-V3 groups them), words with the space behind
# them, single Han characters, punctuation. A number is one token wherever it stands.
PIECES = r" [-+*/=] |\d{1,3}|[A-Za-z]+ ?|\p{Han} ?|[^\w\s] ?|\s+|\w+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train BPE on `texts`. The vocabulary has at most `vocab_size` entries, and encodes any string (byte level).

    By default a text gets the BOS token, as from DeepSeek's own.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        min_frequency=2,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    fast.chat_template = chat_template("chat", tokenizer=fast, leading=BOS)
    return fast
