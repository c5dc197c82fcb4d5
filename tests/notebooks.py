"""Run the notebooks of examples/ from top to bottom; as a script, keep what they showed.

    pip install -e '.[notebooks]' && python tests/notebooks.py

writes the outputs of grpo_from_scratch.ipynb into the file. Those of kaggle_v5e8.ipynb are left
out: without a TPU it only tries its cells on the tiny model. Cells tagged `tpu` are skipped, and
those tagged `libtpu` where that package is missing.
"""

import importlib.util
import json
import os
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRATCH, KAGGLE = EXAMPLES / "grpo_from_scratch.ipynb", EXAMPLES / "kaggle_v5e8.ipynb"
SECONDS = 1800  # that a cell may take on a busy machine


def execute(path: Path, folder: str | Path) -> dict:
    """Run a notebook in `folder`; return it with its new outputs. Raises at the first error."""
    import nbformat
    from nbclient import NotebookClient

    skipped = {"tpu"} if importlib.util.find_spec("libtpu") else {"tpu", "libtpu"}
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells = [cell for cell in notebook.cells
                      if skipped.isdisjoint(cell.metadata.get("tags", []))]  # fmt: skip
    metadata = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook, timeout=SECONDS, resources=metadata, record_timing=False,
        coalesce_streams=True,
    ).execute()  # fmt: skip
    return json.loads(nbformat.writes(notebook))


def printed(notebook: dict) -> dict[str, str]:
    """Return what each cell printed, by its id."""
    return {
        cell["id"]: "".join("".join(output.get("text", "")) for output in cell["outputs"])
        for cell in notebook["cells"] if cell["cell_type"] == "code"
    }  # fmt: skip


def main() -> None:
    """Run grpo_from_scratch and write its outputs, without counts, into the file."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(SCRATCH, folder)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            for output in cell["outputs"]:
                output.pop("execution_count", None)
                if output["output_type"] == "execute_result":
                    output["execution_count"] = None
    notebook["metadata"].pop("language_info", None)
    SCRATCH.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
