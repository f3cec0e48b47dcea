"""How the things of `icons.txt` were chosen; run it to write the list that the installed fonts give.

    python -m vlmoe.data.world.choose_icons > icons.txt

The charmaps of six icon sets name their drawings. A suffix of style ("-outline", "-bold", "-fill") is taken off; names
of the same words in another order ("cart shopping") are one thing. Left out are brands, single letters and digits,
numbered boxes, names that state a size or colour, and names of characters that the world has already.

Things drawn by most sets come first, so that a small dial has things with many drawings; then those of fewer words. A
drawing that is nearly that of an earlier thing or character (masks at 16 pixels differ by less than `choose.NEAR` of
the ink) is left out, for a picture could not tell which of them it shows; things without a drawing drop out.

Of a thing that several sets draw, one set is kept from training: drawn by lot (a hash of the name) among those of
which at least one drawing differs from all the others' by NEAR or more. Those of its drawings that do not differ are
not used at all. A sixteenth of the things of several words, all of which earlier things name too, is unseen.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict

import numpy as np

from vlmoe.data.world.choose import NEAR, SIZE, masks_of, nearest
from vlmoe.data.world.concepts import MAX_CONCEPTS, concepts
from vlmoe.data.world.draws import stable_hash
from vlmoe.data.world.glyphs import icon_mask
from vlmoe.data.world.icons import FONTS, Drawing, charmap, fonts_folder
from vlmoe.data.world.scene import COLOURS

STYLES = {
    "mdi": ("outline", "variant"),
    "ph": ("bold", "fill", "light", "thin"),
    "ri": ("fill", "line"),
    "fa": (),
    "far": (),
    "cod": ("outline", "filled"),
    "el": ("alt",),
}
# Font Awesome's list of brands is read; these words mark further ones, or a set's names for languages and formats.
_BRAND_WORDS = (
    "adobe airbnb airtable alipay amazon android angular apple arch asana atlassian aurelia aws azure baidu "
    "bandcamp behance bing bitbucket bitcoin blackberry blender blogger bootstrap bulma centos chrome chromecast "
    "cisco codepen copilot coreos cpp csharp delicious deviantart digg dingding docker dotnet douban dribbble "
    "dropbox drupal edge eslint ethereum etsy evernote facebook fedora figma firebase firefox flattr flickr "
    "foursquare framer friendfeed gentoo git github gitlab gmail gnome google gradle graphql gumroad hackernews "
    "hackerrank handshake-fb hangouts hexo hulu ifttt instagram internet-explorer ionic itunes java javascript jira "
    "jquery jsfiddle json kickstarter kodi kubernetes laravel lastfm line linkedin linux litecoin manjaro "
    "mastercard mastodon material-ui medium messenger meteor microsoft minecraft mixcloud myspace nativescript "
    "netease netflix nintendo nodejs npm nuxt oci onedrive onepassword openai openid opensource opensuse opera "
    "origin pandora path patreon paypal photobucket picasa pinterest pixelfed playstation plex plurk pocket podcast "
    "polymer powershell producthunt python qq qqchat quora raspberry react reddit redhat rollupjs rss ruby safari "
    "salesforce sass sega sharethis sina skype slack slideshare snapchat snapcraft soundcloud spotify stackoverflow "
    "steam stripe stumbleupon surround svelte switch-nintendo taobao telegram tensorflow terraform tiktok trello "
    "tumblr twitch twitter typescript typo3 ubuntu umbraco unity unsplash untappd vimeo visa visualstudio vscode "
    "vuejs vuetify w3c webpack wechat weibo whatsapp wikipedia windows wix wordpress wunderlist xamarin xbox xing "
    "xmpp yahoo yammer yelp youtube zcool zhihu"
)
BRANDS = frozenset(_BRAND_WORDS.split())
_NUMBERED = re.compile(r"^(alpha|numeric|roman-numeral|number|language|letter|file-word|file-excel|file-powerpoint)-")
# A scene draws size and colour by lot: a name must not state them.
_ATTRIBUTES = {"small", "large", "medium", "xs", "sm", "lg", "xl", "mini", *COLOURS}
_ORDINARY = {"orange"}  # the fruit
_NOT_BRANDS = {"line", "edge", "origin", "path", "pocket", "java"}  # ordinary words where they are not the whole name


def split_style(name: str, styles: tuple[str, ...]) -> tuple[str, str]:
    """("cart", "outline") of "cart-outline"; a name that is a style alone keeps it. Styles may follow each other."""
    found: list[str] = []
    while True:
        head, _, tail = name.rpartition("-")
        if not head or tail not in styles:
            return name, "-".join(reversed(found))
        name = head
        found.append(tail)


def brands() -> frozenset[str]:
    """The names in the package's tables of brands."""
    tables = fonts_folder().glob("fontawesome*-brands-*.json")
    return frozenset(name for path in tables for name in json.loads(path.read_text(encoding="utf-8")))


def is_left_out(name: str, brand_names: frozenset[str]) -> bool:
    words = name.split("-")
    if name in brand_names or name in BRANDS or _NUMBERED.match(name) or words[-1] == "logo":
        return True
    if (set(words) & (BRANDS - _NOT_BRANDS)) or (set(words) & (_ATTRIBUTES - _ORDINARY)):
        return True
    return any(len(w) == 1 and w.isalpha() and w not in "xy" for w in words) or not any(len(w) > 1 for w in words)


def collect() -> dict[str, list[Drawing]]:
    """Name with hyphens -> drawings, sets in the order of FONTS."""
    brand_names = brands()
    named: dict[str, list[Drawing]] = defaultdict(list)
    for font in FONTS:
        table = charmap(font)
        bases = {split_style(n, STYLES[font])[0] for n in table}
        for full, code in sorted(table.items()):
            name, style = split_style(full, STYLES[font])
            number = re.search(r"-(\d)$", name)
            if font == "ri" and number and name[:-2] in bases:  # Remix numbers other drawings of a thing
                name, style = name[:-2], f"{style}-{number[1]}".strip("-")
            if not is_left_out(name, brand_names):
                named[name].append(Drawing(font, style, code))
    return named


def merge(named: dict[str, list[Drawing]]) -> dict[str, list[Drawing]]:
    """Names of the same words are one thing, called as most sets call it; a tie goes to the first set's order."""
    same: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in named:
        same[tuple(sorted(name.split("-")))].append(name)
    merged = {}
    for names in same.values():
        best = max(names, key=lambda n: len({d.set for d in named[n]}))
        merged[best.replace("-", " ")] = [d for n in names for d in named[n]]
    return merged


def order(merged: dict[str, list[Drawing]]) -> list[str]:
    def key(name: str) -> tuple[int, int, int, str]:
        return -len({d.set for d in merged[name]}), len(name.split()), -len(merged[name]), name

    return sorted(merged, key=key)


class Seen:
    """The masks in play so far, in blocks, so that adding one does not copy all."""

    def __init__(self) -> None:
        self.masks = np.zeros((40_000, SIZE * SIZE), np.int16)
        self.count = 0

    def add(self, masks: np.ndarray) -> None:
        self.masks[self.count : self.count + len(masks)] = masks
        self.count += len(masks)

    def nearest(self, mask: np.ndarray) -> float:
        return nearest(self.masks[: self.count], mask[None])


def choose() -> list[str]:
    """The lines of the list."""
    merged = merge(collect())
    seen, words = Seen(), Counter[str]()
    known = concepts(MAX_CONCEPTS)
    for concept in known[10:]:
        seen.add(masks_of(concept.character))
    taken = {concept.name for concept in known}
    lines = []
    for name in order(merged):
        if name in taken:
            continue
        drawings, masks = [], []
        for drawing in merged[name]:
            try:
                mask = icon_mask(drawing, SIZE).reshape(-1).astype(np.int16)
            except ValueError:  # a code point without ink
                continue
            if seen.nearest(mask) >= NEAR and drawing.code not in {d.code for d in drawings if d.font == drawing.font}:
                drawings.append(drawing)
                masks.append(mask)
        if not drawings:
            continue
        stacked = np.stack(masks)
        seen.add(stacked)
        shown = list(zip(drawings, ("",) * len(drawings), strict=True))
        held = hold_out(name, drawings, stacked)
        if held:
            title, kept = held
            shown = [(d, "*" if d.set == title else "") for d, k in zip(drawings, kept, strict=True) if k]
        parts = name.split()
        unseen = len(parts) > 1 and all(words[w] >= 3 for w in parts) and stable_hash(f"unseen {name}") % 16 == 0
        words.update(set(parts) if not unseen else ())
        said = " ".join(f"{mark}{d.font}{'.' if d.style else ''}{d.style}:{d.code:x}" for d, mark in shown)
        lines.append(f"{'?' if unseen else ''}{name}\t{said}")
    return lines


def hold_out(name: str, drawings: list[Drawing], masks: np.ndarray) -> tuple[str, list[bool]] | None:
    """The set to keep from training and, for each drawing, whether it is used; None where no set is different."""
    titles = list(dict.fromkeys(d.set for d in drawings))
    fitting = []
    for title in titles if len(titles) > 1 else []:
        others = masks[[d.set != title for d in drawings]]
        kept = [d.set != title or nearest(others, mask[None]) >= NEAR for d, mask in zip(drawings, masks, strict=True)]
        if any(k and d.set == title for d, k in zip(drawings, kept, strict=True)):
            fitting.append((title, kept))
    return fitting[stable_hash(f"drawing of {name}") % len(fitting)] if fitting else None


if __name__ == "__main__":
    print("\n".join(choose()))
