"""Reading the fields of a config file, each of them explicitly."""

import math
from collections.abc import Collection, Mapping
from typing import TypeVar

from ...formats import CheckpointError, quote_value


# Far larger than in any model, and small enough that the product of three is a valid size.
_MAX_SIZE = 2**24
_MAX_PARTS = 2**10

# Fields of every config of transformers, including old versions, and of tools that write such
# configs. They concern training, generation, other heads or the file, but not the logits.
_COMMON = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _from_model_config _name_or_path add_cross_attention architectures
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_config
    cache_implementation chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing guidance_scale id2label is_decoder is_encoder_decoder
    keys_to_ignore_at_inference label2id length_penalty loss_type low_memory max_length
    max_new_tokens max_position_embeddings max_seq_length max_sequence_length max_time
    min_length min_new_tokens min_p model_max_length name_or_path no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_logits output_scores pad_token_id penalty_alpha prefix
    problem_type pruned_heads remove_invalid_values renormalize_logits repetition_penalty
    return_dict return_dict_in_generate sep_token_id sequence_bias stop_strings suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_last_hidden_states
    token_healing tokenizer_class top_h top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache use_return_dict watermarking_config
    """.split()  # noqa: SIM905
)

_Value = TypeVar("_Value")


class Fields:
    """The fields of a JSON object, each of which must be read or explicitly ignored.

    Every method that reads a field raises a `CheckpointError` for an invalid value. `finish` raises
    one for fields that have been neither read nor ignored, because they may change what the model
    computes.
    """

    def __init__(self, values: object, name: str):
        """**Arguments:**

        - `values`: the parsed JSON.
        - `name`: how messages refer to the object.

        **Raises:** `CheckpointError` if `values` is not an object.
        """
        if not isinstance(values, dict):
            raise CheckpointError(
                f"{name} must be a JSON object, but is {quote_value(values)}. "
                "Use the `config.json` that belongs to the weights."
            )
        self._values: dict[str, object] = {str(key): value for key, value in values.items()}
        self._unread = dict.fromkeys(self._values)
        self._name = name

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: object) -> object:
        """Reads any value; the default if the field is missing."""
        self._unread.pop(key, None)
        return self._values.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        """Reads an integer of at least 1. The field is required if there is no default."""
        value = self.get(key, default)
        if value is None and key not in self._values:
            raise CheckpointError(
                f"{self._name} has no `{key}`, which is required. The config is incomplete, or in "
                "a layout that is not supported."
            )
        return self._integer(key, value, 1, _MAX_SIZE)

    def optional_size(self, key: str, default: int) -> int:
        """Reads an integer of at least 1; the default if the field is missing or null."""
        return default if self.get(key, None) is None else self.size(key)

    def count(self, key: str, default: int | None = None) -> int:
        """Reads the number of layers, or of experts with names of their own."""
        return self._integer(key, self.size(key, default), 1, _MAX_PARTS)

    def natural(self, key: str, default: int) -> int:
        """Reads an integer of at least 0."""
        return self._integer(key, self.get(key, default), 0, _MAX_SIZE)

    def indices(self, key: str, count: int) -> frozenset[int]:
        """Reads a list of different integers from 0 to `count - 1`; none if missing or null."""
        value = self.get(key, None)
        value = [] if value is None else value
        if (
            not isinstance(value, list)
            or any(type(i) is not int or not 0 <= i < count for i in value)
            or len(set(value)) != len(value)
        ):
            raise self.error(key, f"must be a list of different integers from 0 to {count - 1}")
        return frozenset(value)

    def series(self, key: str, known: Mapping[str, _Value]) -> list[_Value] | None:
        """Reads a list of names, or a text of one letter each; `None` if the field is missing.

        **Arguments:**

        - `key`: the name of the field.
        - `known`: the values that the names stand for.
        """
        value = self.get(key, None)
        if value is None:
            return None
        if (
            not isinstance(value, str | list)
            or not 1 <= len(value) <= _MAX_PARTS
            or any(not isinstance(name, str) or name not in known for name in value)
        ):
            options = ", ".join(map(quote_value, known))
            raise self.error(key, f"must be 1 to {_MAX_PARTS} of {options}")
        return [known[name] for name in value]

    def flag(self, key: str, default: bool) -> bool:
        """Reads a boolean."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def number(self, key: str, default: int | float, *, limit: int = _MAX_SIZE) -> float:
        """Reads a number above 0 and at most `limit`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "must be a number")
        if not (0 < value <= limit):
            raise self.error(key, f"must be above 0 and at most {limit}")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Reads a list of `count` numbers above 0; ones if the field is missing or null."""
        value = self.get(key, None)
        value = [1.0] * count if value is None else value
        if (
            not isinstance(value, list)
            or len(value) != count
            or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value)
            or not all(0 < v <= _MAX_SIZE for v in value)
        ):
            raise self.error(key, f"must be {count} numbers above 0 and at most {_MAX_SIZE}")
        return tuple(map(float, value))

    def refined(self, key: str, near: float, meaning: str) -> float:
        """Reads a number that other fields give up to rounding; `near` if the field is missing.

        **Arguments:**

        - `key`: the name of the field.
        - `near`: the number that the other fields give.
        - `meaning`: the formula of that number.
        """
        if not 0 < near <= _MAX_SIZE:
            raise CheckpointError(
                f"{meaning} of {self._name} must be above 0 and at most {_MAX_SIZE}, but is {near}."
            )
        value = self.number(key, near)
        if not math.isclose(value, near, rel_tol=1e-15):
            raise self.error(key, f"must be {meaning} = {near}")
        return value

    def multiple_of(self, size: int, key: str, default: int | float) -> int:
        """Reads a number, and returns `int(number * size)` as upstream does."""
        multiple = int(self.number(key, default) * size)
        if not 1 <= multiple <= _MAX_SIZE:
            raise self.error(key, f"times {size} must be from 1 to {_MAX_SIZE}")
        return multiple

    def limit(self, key: str) -> tuple[float, float]:
        """Reads a lower and an upper bound; zero and infinity if the field is missing."""
        value = self.get(key, [0.0, math.inf])
        if (
            not isinstance(value, list)
            or len(value) != 2
            or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value)
            or not 0 <= value[0] <= value[1]
            or value[0] > _MAX_SIZE
            or value[1] == 0
        ):
            raise self.error(key, "must be two numbers of at least 0, the smaller one first")
        return float(value[0]), float(value[1])

    def only(self, key: str, supported: Collection[_Value], default: object) -> _Value:
        """Reads a field of which only some values are supported."""
        value = self.get(key, default)
        for known in supported:
            # Types are compared as well, because `0 == False`.
            if type(value) is type(known) and value == known:
                return known
        options = " or ".join(map(quote_value, supported))
        raise self.error(key, f"must be {options}")

    def ignore(self, keys: Collection[str]) -> None:
        """Ignores fields, which may be missing, that do not affect what the model computes."""
        for key in keys:
            self._unread.pop(key, None)

    def ignore_common(self) -> None:
        """Ignores the fields of every transformers config that do not affect the logits.

        **Raises:** `CheckpointError` if the config is that of quantised weights.
        """
        quantised = self.get("quantization_config", None)
        if quantised is not None:
            raise CheckpointError(
                f"{self._name} has a `quantization_config` ({quote_value(quantised)}), and "
                "such quantised checkpoints are not read, only those of this library. Use the "
                "checkpoint that it was made from."
            )
        self.ignore(_COMMON)

    def finish(self) -> None:
        """Checks that all fields have been read.

        **Raises:** `CheckpointError` if a field has been neither read nor ignored.
        """
        if self._unread:
            names = ", ".join(quote_value(key) for key in list(self._unread)[:10])
            raise CheckpointError(
                f"{self._name} has fields of unknown meaning, which may change what the model "
                f"computes: {names}. If they do not, remove them from the config."
            )

    def error(self, key: str, requirement: str) -> CheckpointError:
        """Returns an error that names a field, its value and the requirement."""
        value = self._values.get(key)
        return CheckpointError(
            f"`{key}` of {self._name} {requirement}, but is {quote_value(value)}."
        )

    def _integer(self, key: str, value: object, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"must be an integer from {low} to {high}")
        return value


def limit_to_json(limit: tuple[float, float]) -> list[object]:
    """Returns the JSON that `Fields.limit` reads, with infinity in the notation of transformers."""
    return [{"__float__": "Infinity"} if bound == math.inf else bound for bound in limit]
