"""COCO and Flickr30k with captions, as Karpathy and Fei-Fei (2015) split them: dataset_coco.json and
dataset_flickr30k.json."""

from __future__ import annotations

from pathlib import Path

from vlmoe.config import FilesConfig, UserError
from vlmoe.data.downstream.example import Example
from vlmoe.data.downstream.files import FileExamples, below, images_folder, need, path_list, read_list


class Karpathy(FileExamples):
    """One example an image, with all its captions. files.part: which of the file's splits, like "train,restval"; empty:
    all. files.images: the folder that the file's "filepath" (COCO: train2014, val2014) and "filename" are in."""

    def __init__(self, task: str, files: FilesConfig, image_size: int, max_pixels: int) -> None:
        super().__init__(files, image_size, max_pixels)
        self.task = task
        folder = images_folder(files)
        wanted = {part.strip() for part in files.part.split(",") if part.strip()}
        self._images = path_list()
        seen: dict[str, str] = {}
        met: set[str] = set()
        for number, image in enumerate(read_list(files.file, "images")[1]):
            where = f"{files.file}: images[{number}]"
            part = need(image, "split", str, where)
            met.add(part)
            name = need(image, "filename", str, where)
            if wanted and part not in wanted:
                continue
            sentences = need(image, "sentences", list, where)
            raw = [s.get("raw") if isinstance(s, dict) else None for s in sentences]
            texts = [" ".join(t.split()) for t in raw if isinstance(t, str) and t.strip()]
            if not texts or len(texts) < len(raw):
                raise UserError(f"{where}: 'sentences' must be objects with a text 'raw', at least one")
            path = f"{image['filepath']}/{name}" if image.get("filepath") else name
            self.add(Example(path, (), None, None, tuple(texts)), where, seen)
            self._images.append(below(folder, path, where))
        if wanted - met:
            missing = ", ".join(sorted(wanted - met))
            raise UserError(f"{files.file}: has no split {missing}; there are {', '.join(sorted(met))}")
        self.check_filled()

    def paths(self, index: int) -> list[Path]:
        return [self._images[index]]
