"""NLVR2 (Suhr et al. 2019): lines of JSON, two images for each."""

from __future__ import annotations

from pathlib import Path

from vlmoe.config import FilesConfig, UserError, json_lines
from vlmoe.data.downstream.example import Example
from vlmoe.data.downstream.files import FileExamples, below, images_folder, need, path_list
from vlmoe.metrics import sentence_id

LABELS = ("False", "True")


class NLVR2Files(FileExamples):
    """files.file: .jsonl with "sentence", "identifier" and "label" (none in hidden test sets); files.images: the folder
    with IDENTIFIER-img0.png and -img1.png (the identifier without its last part), in the line's "directory" if it has
    one (as the training set)."""

    task = "nlvr2"

    def __init__(self, files: FilesConfig, image_size: int, max_pixels: int) -> None:
        super().__init__(files, image_size, max_pixels)
        folder, self.labels = images_folder(files), LABELS
        self._images = path_list()
        seen: dict[str, str] = {}
        for where, line in json_lines(files.file):
            key, sentence = need(line, "identifier", str, where), need(line, "sentence", str, where)
            try:
                group = sentence_id(key)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
            label = None
            if "label" in line:
                name = str(line["label"]).capitalize()
                if name not in LABELS:
                    raise UserError(f"{where}: label is {line['label']!r}, expected True or False")
                label = LABELS.index(name)
            self.add(Example(key, (), sentence, None, (), label, group), where, seen)
            stem, inside = key.rpartition("-")[0], line.get("directory")
            names = [f"{stem}-img{side}.png" for side in (0, 1)]
            if inside is not None:
                names = [f"{inside}/{name}" for name in names]
            for name in names:
                self._images.append(below(folder, name, where))
        self.check_filled()

    def paths(self, index: int) -> list[Path]:
        return [self._images[2 * index], self._images[2 * index + 1]]
