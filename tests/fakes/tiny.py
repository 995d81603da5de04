"""A tiny random Gemma 3 and a tokenizer with Gemma's control tokens at Gemma's ids, for tests without a network."""

from functools import cache

WORDS = 512
# What every tiny study shares: the bundled sample, few rows, ranks that fit a width of 64.
TINY = {
    "train_rows": 4,
    "valid_rows": 1,
    "test_rows": 2,
    "max_length": 700,
    "max_new_tokens": 6,
    "batch_size": 2,
    "micro_batch_size": 2,
    "lora_rank": 4,
    "galore_rank": 8,
    "apollo_rank": 8,
    "galore_update_interval": 3,
    "precision": "fp32",
    "device": "cpu",
    "workers": 1,
    "logging_steps": 1,
    "max_save_overhead": 0.0,
}


@cache
def tokenizer():
    """Byte-level fallback vocabulary; <pad> 0, <eos> 1, <bos> 2, <unk> 3, turn tokens 105 and 106 as in Gemma 3."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from peftlib.models import chat_template as chat

    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    vocab |= {f"<unused{i}>": 4 + i for i in range(101)}  # 4..104
    vocab |= {"<start_of_turn>": chat.START_OF_TURN, "<end_of_turn>": chat.END_OF_TURN}
    vocab |= {f"<0x{byte:02X}>": 107 + byte for byte in range(256)}  # 107..362
    for piece in ["\n", "\n\n", "▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()<>_-/"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("\n", "\n")]
    for word in ("the", "and", "user", "model", "ing", "is", "of", "to", "answer"):
        for end in range(2, len(word) + 1):
            if (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
                vocab.setdefault(word[:end], len(vocab))
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    controls = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    bpe.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in controls])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def config(**changes):
    from transformers import Gemma3TextConfig

    sizes = {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return Gemma3TextConfig(**{**sizes, **changes})


def model(seed=0, **changes):
    """A random Gemma3ForCausalLM in float32."""
    import torch
    from transformers import Gemma3ForCausalLM

    torch.manual_seed(seed)
    return Gemma3ForCausalLM(config(**changes)).eval()


def model_folder(folder, seed=0, **changes):
    """`folder`, filled with the tiny model and tokenizer as a hub repository would be; returns it."""
    model(seed, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
