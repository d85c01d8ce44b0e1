"""Export a trained model for other tools, or convert one of theirs: the command.

python -m minimind.export --run-dir RUN --output DIR [--step N] [--format hf|minimind|pth]
python -m minimind.export --checkpoint STEP_OR_EXPORT_OR_HUGGING_FACE_FOLDER_OR_PTH --output DIR
"""

from collections.abc import Sequence

from minimind.checkpoints.formats.export import ExportFlags, choose_checkpoint, export
from minimind.checkpoints.formats.source import open_source
from minimind.cli import parse_flags
from minimind.config.run_config import preset
from minimind.errors import UserError, run_main
from minimind.model.tuning import count


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = parse_flags(ExportFlags, args, prog="python -m minimind.export")
    if flags.output.exists():
        raise UserError(f"output: {flags.output} exists; give a new folder")
    base = None if flags.model is None else preset(flags.model)
    source = open_source(choose_checkpoint(flags), base)
    if base is not None and source.where.suffix not in (".pth", ".pt"):
        raise UserError("model: only a .pth needs a preset; other checkpoints include their config")
    kind = export(source, flags)
    adapters = source.adapters if flags.format == "peft" else None
    size = source.config.num_params() if adapters is None else count(adapters.shapes)
    print(f"wrote {flags.output}: {kind}, {size:,} parameters, {flags.dtype}")


if __name__ == "__main__":
    run_main(main)
