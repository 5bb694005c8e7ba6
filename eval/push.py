"""Upload a run's export and a model card to the Hugging Face hub.

The model card is made from the run's own records. The token comes from `hf auth login` or HF_TOKEN
and is never written anywhere. A repeated upload skips files that the hub already has.

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
from core.files import write_text
from core.run import RunFiles
from data.tokenizer import FILE
from data.tokenizer import load as load_tokenizer
from eval.config import EvaluationConfig
from eval.hf.card import model_card
from eval.hf.exported import require_export
from eval.model_source import export_folder, find_checkpoint

logger = logging.getLogger(__name__)


def push(config: EvaluationConfig) -> None:
    """Check the export, write the model card and upload both; a new repository is private."""
    if config.export.hub is None:
        raise InputError("no repository to upload to: give export.hub=USER/MODEL")
    checkpoint = find_checkpoint(config)
    hf_folder = export_folder(config, checkpoint)
    require_export(hf_folder, checkpoint)
    files = config.run.files
    if not files.config.is_file():
        raise InputError(f"{files.folder} has no config.yaml: train/pretrain.py writes it")
    tokenizer = load_tokenizer(hf_folder / FILE)
    curves = files.curves.is_file()
    write_text(files.card, model_card(files.folder, checkpoint, config.model, tokenizer, curves))
    api = HfApi()
    logger.info(f"uploading {hf_folder} to {config.export.hub}")
    try:
        api.create_repo(config.export.hub, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=config.export.hub,
            folder_path=hf_folder,
            # the card of the export is older than this one, which has the scores
            ignore_patterns=[RunFiles.export_record(hf_folder).name, files.card.name],
            commit_message=f"{checkpoint.name} of {config.run.name}",
        )
        for path in (files.card, files.curves):
            if path.is_file():
                api.upload_file(
                    repo_id=config.export.hub, path_or_fileobj=path, path_in_repo=path.name
                )
    except HfHubHTTPError as error:
        first_line = str(error).splitlines()[0]
        raise InputError(
            f"the hub refused ({first_line}): log in with `hf auth login`, check export.hub"
        ) from error
    logger.info(f"published: https://huggingface.co/{config.export.hub} (private)")


main = command(EvaluationConfig)(push)

if __name__ == "__main__":
    main()
