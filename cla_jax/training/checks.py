"""Whether prepared tokens go with a model and a recipe."""

from cla_jax.configs import DataConfig, ModelConfig
from cla_jax.data.pipeline import training_rows
from cla_jax.data.token_stream import Streams, TokenStream

__all__ = ["check_streams"]


def check_streams(config: ModelConfig, data: DataConfig, streams: Streams) -> None:
    """Whether prepared tokens go with a model and fill its batches.

    Args:
        config: the model.
        data: which windows of the streams make a batch.
        streams: the tokens.

    Raises:
        ValueError: a tokenizer larger than the vocabulary, a sequence length longer than the
            model's, a stream shorter than one batch, no token to validate on.
    """
    for stream in (streams.train, streams.validation):
        if stream.vocab_size > config.vocab_size:
            raise ValueError(
                f"tokenizer {stream.tokenizer!r} has {stream.vocab_size} ids, more than "
                f"{config.name}'s vocab_size={config.vocab_size}: use a model with at least "
                f"{stream.vocab_size}, or a smaller tokenizer"
            )
    if data.sequence_length > config.sequence_length:
        raise ValueError(
            f"sequence_length={data.sequence_length} is longer than {config.name}'s "
            f"{config.sequence_length}; the longest that it takes is {config.sequence_length}"
        )
    _check_length(streams.train, data)
    if streams.validation.num_tokens < 2:
        raise ValueError("the validation stream has no token to predict: give it more text")


def _check_length(stream: TokenStream, data: DataConfig) -> None:
    if stream.num_tokens <= data.sequence_length and data.packing == "concat":
        raise ValueError(
            f"the {stream.split} stream has {stream.num_tokens} tokens: shorter than one window of "
            f"sequence_length={data.sequence_length}; the longest that works is "
            f"{max(stream.num_tokens - 1, 0)}"
        )
    rows = len(training_rows(stream, data))
    if rows < data.batch_size:
        raise ValueError(
            f"the {stream.split} stream has {stream.num_tokens} tokens, {rows} rows of "
            f"{data.sequence_length}: fewer than one batch of {data.batch_size}; the largest "
            f"batch_size that works is {rows}"
        )
