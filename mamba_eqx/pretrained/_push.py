"""Uploading a model to a repository on the Hugging Face Hub."""

import os
import tempfile
from pathlib import Path

from ..models import LanguageModel
from ..text import ByteTokenizer, TextTokenizer
from ._card import CARD, model_card
from ._companions import Companions, companions_of
from ._folder import is_weights
from ._hub import Hub
from ._hub_errors import Place, failure
from ._quantized import quantization_of
from ._save import save_checkpoint
from .layouts import config_from


def push_to_hub(
    model: LanguageModel,
    repo_id: str,
    *,
    layout: str = "transformers",
    max_shard_size: int | str | None = "5GB",
    tokenizer: TextTokenizer | ByteTokenizer | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
    endpoint: str | None = None,
) -> str:
    """Saves a model in a repository on the Hugging Face Hub, which is created if necessary.

    ```python
    mbx.push_to_hub(model, "me/my-mamba", private=True)
    ```

    The upload is a single commit, before which the repository is unchanged. The commit adds the
    config and the weights, and a model card if the repository has none. It removes other weights
    that a reader might load instead, and with a `tokenizer` also the files of another one.

    **Arguments:**

    - `model`, `layout`, `max_shard_size`, `tokenizer`: see [`mamba_eqx.save_pretrained`][].
    - `repo_id`: the name of the repository, `owner/name`.
    - `revision`: the branch, which is created if necessary. By default the main branch.
    - `token`: an access token of the Hub. By default the token that you are logged in with.
    - `private`: whether a new repository is private. By default as set in your account.
    - `commit_message`: the first line of the commit's message.
    - `create_pr`: whether to open a pull request instead of committing to the branch.
    - `endpoint`: the address of another Hub. By default `HF_ENDPOINT` or the public one.

    **Returns:**

    The address of the commit. The string is also the `CommitInfo` of `huggingface_hub`, whose
    `pr_url` is the address of the pull request.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the layout cannot store the model, or the Hub
    refuses the upload; `ValueError` if `max_shard_size` is not valid, `tokenizer` is not one of
    this package, or `token`, `revision` or `endpoint` cannot be one.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    companions = Companions() if tokenizer is None else companions_of(tokenizer)
    hub = Hub(revision, token, endpoint=endpoint)
    api = HfApi(endpoint=hub.address, token=hub.token, headers=hub.password_header())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Saved first, so that nothing is created on the Hub for a model that cannot be saved.
        save_checkpoint(model, folder, companions, layout=layout, max_shard_size=max_shard_size)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            siblings = api.model_info(repo_id, revision=revision).siblings or []
            there = {file.rfilename for file in siblings}
            quantized = quantization_of(model) is not None
            card = model_card(config_from(model), layout=layout, name=repo_id, quantized=quantized)
            (folder / CARD).write_text(card, "utf-8")
            new = {name for name in os.listdir(folder) if name != CARD or name not in there}
            stale = {n for n in there - new if is_weights(n) or n in companions.replaces}
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, folder / name) for name in sorted(new)),
                    *(CommitOperationDelete(name) for name in sorted(stale)),
                ],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        except Exception as error:  # Of any type; see `failure`.
            place = Place(repo_id, revision, hub.shown_endpoint, secrets=hub.secrets)
            failed = failure(place, error, writing=True)
            raise failed from failed.__cause__
