"""Publish: upload a run's export with a model card.

The card is made of the run's own records. The token is that of `hf auth login` or HF_TOKEN; it is
never written anywhere. Uploading again continues: files that the hub has already are not sent
twice.

examples:
  python eval/push.py +experiment=demo export.hub=USER/MODEL
"""

import logging
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from core.command import command
from core.errors import InputError
from eval.config import EvaluationConfig
from eval.hf.card import model_card
from eval.hf.exported import require_export
from eval.subject import export_folder, find_checkpoint

logger = logging.getLogger(__name__)


def push(config: EvaluationConfig) -> None:
    """Check the export, write the card and upload; a new repository is private."""
    if config.export.hub is None:
        raise InputError("where to? give export.hub=USER/MODEL")
    folder = find_checkpoint(config)
    home = export_folder(config, folder)
    require_export(home, folder)
    card = config.run.files.card
    card.write_text(model_card(config.run.folder, folder, config.model), encoding="utf-8")
    api = HfApi()
    logger.info(f"uploading {home} to {config.export.hub}")
    try:
        api.create_repo(config.export.hub, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=config.export.hub,
            folder_path=home,
            commit_message=f"{folder.name} of {config.run.name}",
        )
        for path in (card, config.run.files.curves):
            if path.is_file():
                api.upload_file(
                    repo_id=config.export.hub, path_or_fileobj=path, path_in_repo=path.name
                )
    except HfHubHTTPError as error:
        line = str(error).splitlines()[0]
        raise InputError(
            f"the hub refused ({line}): log in with `hf auth login`, check export.hub"
        ) from error
    logger.info(f"published: https://huggingface.co/{config.export.hub} (private)")


main = command(EvaluationConfig)(push)

if __name__ == "__main__":
    main()
