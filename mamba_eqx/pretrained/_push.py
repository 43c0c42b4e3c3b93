"""From a model to a repository on the Hugging Face Hub."""

import os
import tempfile
from pathlib import Path

from ..models import LanguageModel
from ._card import CARD, model_card
from ._hub_errors import Place, failure
from ._save import is_weights, save_pretrained
from .layouts import config_from


def push_to_hub(
    model: LanguageModel,
    repo_id: str,
    *,
    layout: str = "transformers",
    max_shard_size: int | str | None = "5GB",
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
    endpoint: str | None = None,
) -> str:
    """Saves a model in a repository on the Hugging Face Hub, which is made if need be.

    ```python
    mbx.push_to_hub(model, "me/my-mamba", private=True)
    ```

    It is one commit: the config and the weights, a model card if the repository has none, and the
    removal of weights that a reader might take for these. Until it is made, the repository is as
    it was.

    **Arguments:**

    - `model`, `layout`, `max_shard_size`: see [`mamba_eqx.save_pretrained`][].
    - `repo_id`: the name of the repository.
    - `revision`: the branch, which is made if need be; the main one by default.
    - `token`: the Hub's; by default the one that you logged in with.
    - `private`: whether a repository that is made is private; as your account has it by default.
    - `commit_message`: the first line of the commit's message.
    - `create_pr`: whether to open a pull request, instead of changing the branch.
    - `endpoint`: the address of another Hub, by default `HF_ENDPOINT` or the public one.

    **Returns:**

    The address of the commit: a string, and the `CommitInfo` of `huggingface_hub`, of which
    `pr_url` is that of the pull request.

    **Raises:** [`mamba_eqx.CheckpointError`][] if the layout cannot hold the model, or the Hub
    refuses it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # First, so that nothing is made at the Hub for a model that cannot be saved.
        save_pretrained(model, folder, layout=layout, max_shard_size=max_shard_size)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            siblings = api.model_info(repo_id, revision=revision).siblings or []
            there = {file.rfilename for file in siblings}
            card = model_card(config_from(model), layout=layout, name=repo_id)
            (folder / CARD).write_text(card, "utf-8")
            new = {name for name in os.listdir(folder) if name != CARD or name not in there}
            stale = {name for name in there - new if is_weights(name)}
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
        # Any: see `_hub.py`.
        except Exception as error:
            raise failure(Place(repo_id, revision, endpoint), error, writing=True) from error
