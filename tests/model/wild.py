"""Small models and tokenizers with the properties of those in the wild."""

import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip


def byte_tokenizer(*extra: str) -> tf.PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with BOS, EOS, a padding token, and ``extra`` special tokens without a role."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|bos|>", "<|eos|>", "<|pad|>", *extra)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )


def random_model(config) -> tf.PreTrainedModel:
    """Return a model whose distributions are far from uniform."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(3.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [1], 0
    return model.eval()
