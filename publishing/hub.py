"""Put a checkpoint on the Hugging Face Hub: check it, write its card, upload it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import PublishingError
from .files import IGNORE_PATTERNS, files_to_publish, readable_size
from .fresh_process import FreshCheck, check_in_fresh_process
from .model_card import CARD_NAME, build_model_card, common_license, is_hand_written, read_parts, read_results
from .static_checks import check_files


#: Weights of an earlier upload that this one does not have would be loaded instead of, or mixed with, the new ones.
_STALE_WEIGHTS = ["model*.safetensors", "model*.safetensors.index.json"]

#: Ways in which the Hub says no or does not answer. A failed transfer of a file is a RuntimeError.
_HUB_ERRORS = (HTTPError, LocalTokenNotFoundError, ConnectionError, TimeoutError, RuntimeError)


@dataclass
class PushReport:
    """What `push` did.

    Args:
        repo_id: The repository.
        url: Where the checkpoint is now, `None` after a dry run.
        check: What the fresh process found out.
        files: Files of the upload and their sizes in bytes.
        left_out: Files in the folder that are not uploaded, likewise.
        card_written: Whether `README.md` was written; otherwise the one that was there is kept.
        warnings: What the user should know.
    """

    repo_id: str
    url: str | None
    check: FreshCheck
    files: dict[str, int]
    left_out: dict[str, int]
    card_written: bool
    warnings: list[str] = field(default_factory=list)

    def print(self, console: Console) -> None:
        """Show it as a table."""
        title = "Uploaded" if self.url else "Would be uploaded"
        table = Table("File", "Size", title=f"{title} to {self.repo_id}", title_justify="left")
        table.columns[1].justify = "right"
        for name, size in self.files.items():
            table.add_row(escape(name), readable_size(size))
        table.add_section()
        table.add_row(f"{len(self.files)} files", readable_size(sum(self.files.values())))
        console.print(table)
        if self.left_out:
            names = ", ".join(self.left_out)
            size = readable_size(sum(self.left_out.values()))
            console.print(f"Left out, {size}: {names}", markup=False, highlight=False)
        card = "written" if self.card_written else "kept as it was"
        console.print(f"Model card: {CARD_NAME}, {card}.", highlight=False)
        if self.url:
            console.print(self.url, markup=False)


def push(
    checkpoint: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    results: str | os.PathLike | None = None,
    dry_run: bool = False,
    quick: bool = False,
    overwrite_card: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    timeout: float = 3600,
    token: str | None = None,
    api: HfApi | None = None,
    on_step: Callable[[str], None] = lambda step: None,
    on_warning: Callable[[str], None] = lambda warning: None,
) -> PushReport:
    """Check a checkpoint in a fresh process, write its model card and upload it.

    A repository that is not there is made. Files of training (optimizer, logs, `checkpoint-*`) are left out.

    Args:
        checkpoint: The folder that `save_pretrained` of model and processor wrote.
        repo_id: `owner/name`.
        private: Whether a new repository is private. One that exists stays as it is.
        license: Licence of the model, such as `apache-2.0`. Default: that of its parts, if they have the same one.
        results: JSON file of evaluation results for the card, `{"data set": {"metric": number}}`.
        dry_run: Do everything but the upload, without the network.
        quick: Load the checkpoint once only, and do not save it again. For big ones.
        overwrite_card: Replace a `README.md` that was written or edited by hand.
        revision: Branch to upload to, made if it is not there.
        commit_message: Default: one that names anyvlm.
        timeout: Seconds that each fresh process may take.
        token: Token of the Hub. Default: that of `hf auth login`, or `HF_TOKEN`.
        api: Client of the Hub, in place of one made with `token`.
        on_step: Called with the name of each step as it begins.
        on_warning: Called with each warning as it comes up, before anything is uploaded.

    Raises:
        PublishingError: the checkpoint does not pass, or the Hub refuses it; the message says what to do.
    """
    checkpoint = Path(checkpoint)
    warnings: list[str] = []

    def warn(warning: str) -> None:
        warnings.append(warning)
        on_warning(warning)

    _check_repo_id(repo_id)
    on_step("check the files")
    check_files(checkpoint)
    result_values = read_results(results) if results is not None else None
    api = api or HfApi(token=token)
    if not dry_run:
        # A missing login should not show after minutes of loading.
        on_step("look at the repository on the Hub")
        _check_access(api, repo_id, private, warn)
    check = check_in_fresh_process(checkpoint, quick=quick, timeout=timeout, on_step=on_step)

    card_path = checkpoint / CARD_NAME
    card_written = overwrite_card or not card_path.is_file() or not is_hand_written(card_path)
    if card_written:
        on_step("write the model card")
        card = build_model_card(checkpoint, repo_id, check, license=license, results=result_values, revision=revision)
        card.save(card_path)
        if license is None and common_license(read_parts(checkpoint)) is None:
            warn("The parts do not share one known licence, so the card says `other`. Pass --license if you know it.")
    else:
        warn(f"{CARD_NAME} was written by hand and is kept. --overwrite-card writes a new one.")
        if license or results:
            warn(f"--license and --results have no effect on the {CARD_NAME} that is kept.")

    files, left_out = files_to_publish(checkpoint)
    url = None
    if not dry_run:
        on_step(f"upload {readable_size(sum(files.values()))}")
        url = _upload(api, checkpoint, repo_id, private, revision, commit_message)
    return PushReport(repo_id, url, check, files, left_out, card_written, warnings)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishingError(f"{repo_id!r} is no name for a repository: {_one_line(error)}") from None
    if "/" not in repo_id:
        raise PublishingError(f"{repo_id!r} lacks its owner. Write owner/{repo_id}.")


def _check_access(api: HfApi, repo_id: str, private: bool, warn: Callable[[str], None]) -> None:
    """Warn about a repository that is there with another visibility than the one asked for.

    Raises:
        PublishingError: not logged in, or the Hub cannot be reached.
    """
    try:
        api.whoami()
        is_private = bool(api.repo_info(repo_id).private)
    except RepositoryNotFoundError:
        return
    except _HUB_ERRORS as error:
        raise PublishingError(_explanation(error, repo_id)) from error
    if private and not is_private:
        warn(f"{repo_id} exists and is public: what is uploaded can be read by everyone.")
    if not private and is_private:
        warn(f"{repo_id} exists and is private, and stays so. Change it in its settings on the Hub.")


def _upload(
    api: HfApi, checkpoint: Path, repo_id: str, private: bool, revision: str | None, commit_message: str | None
) -> str:
    """Address of the repository after the upload."""
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=checkpoint,
            revision=revision,
            commit_message=commit_message or "Upload a model composed with anyvlm",
            ignore_patterns=list(IGNORE_PATTERNS),
            delete_patterns=_STALE_WEIGHTS,
        )
    except _HUB_ERRORS as error:
        raise PublishingError(_explanation(error, repo_id)) from error
    except ValueError as error:  # the metadata of the card, which the Hub validates before it takes anything
        raise PublishingError(f"The Hub refused {repo_id}: {_one_line(error)}") from error
    return str(url)


def _explanation(error: Exception, repo_id: str) -> str:
    """What to do about an error of the Hub, in one line."""
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub cannot be reached: HF_HUB_OFFLINE is set. Unset it, or pass --dry-run."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "The Hub does not know who you are. Log in with `hf auth login`, with a token that may write."
    if status == 403:
        return (
            f"The token may not write to {repo_id}. Log in with `hf auth login` as someone who may, with a token that "
            "has write permission (https://huggingface.co/settings/tokens)."
        )
    if status is not None:
        return f"The Hub refused {repo_id}: {_one_line(error)}"
    return (
        f"The Hub did not answer ({_one_line(error)}). Check the connection and run this again: files that "
        "are there already are not sent twice."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
