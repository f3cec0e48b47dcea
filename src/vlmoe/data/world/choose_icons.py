"""How the things of `icons.txt` were chosen; run it to write the list that the installed fonts give.

    python -m vlmoe.data.world.choose_icons > icons.txt

The charmaps of six icon sets name their drawings. A suffix of style ("-outline", "-bold", "-fill") is taken off; names
of the same words in another order ("cart shopping") are one thing, unless one set has both. Left out are brands, single
letters and digits, numbered boxes, names that state a size or colour, and names of characters that the world has.

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
# Font Awesome's list of brands is read; these words mark further ones.
_BRAND_WORDS = (
    "adobe airbnb airplay airtable alexa alipay amazon android angular apple arch asana atlassian aurelia aws azure "
    "babel baidu bandcamp behance betamax bing bitbucket bitcoin blackberry blender blogger bootstrap bulma carplay "
    "centos chrome chromecast cisco codepen copilot cordova coreos cortana cpp cryengine csharp debian deezer "
    "delicious deviantart digg dingding disqus docker dotnet douban dribbble dropbox drupal edge emby eslint "
    "ethereum etsy evernote facebook fedora figma firebase firefox flattr flickr foursquare framer friendfeed "
    "gentoo git github gitlab gmail gnome gog google googleplus gradle graphql gumroad hackernews hackerrank "
    "hangouts hexo hololens homekit hubot hulu ifttt imac instagram iobroker ionic ipad iphone ipod itunes jabber "
    "java javascript jira jquery jsfiddle json kaggle kickstarter klingon kodi kubernetes laravel lastfm lastpass "
    "line linkedin linux litecoin livejournal lumx lyft mac macbook manjaro mapbox mastercard mastodon medium mesa "
    "messenger meteor mickey microsoft minecraft mixcloud myspace nativescript netease netflix nintendo nix nodejs "
    "nokia notdef npm npmjs nuxt oci octoface onedrive onepassword openai openid opensource opensuse opera origin "
    "pandora pantone path patreon paypal photobucket php picasa pinterest pixelfed playstation plex plurk pocket "
    "podcast polymer powershell producthunt python qq qqchat quora raspberry react reactjs reddit redhat redux "
    "remixicon rollupjs rss ruby safari salesforce samsung sass sega sharethis sina siri skype slack slideshare "
    "snapchat snapcraft sony soundcloud spotify stackoverflow stackshare steam stripe stumbleupon surround svelte "
    "tailwind taobao teamviewer telegram tensorflow terraform tiktok toslink trello tumblr twitch twitter "
    "typescript typo3 uber ubisoft ubuntu umbraco unity unreal unsplash untappd vimeo visa visualstudio vk "
    "vkontakte vlc vscode vuejs vuetify w3c webpack wechat weibo whatsapp wikipedia windows wix wordpress "
    "wunderlist xamarin xbox xing xmpp yahoo yammer yelp youtube zcool zend zhihu zigbee"
)
BRANDS = frozenset(_BRAND_WORDS.split())
_NUMBERED = re.compile(r"^(alpha|numeric|roman-numeral|number|language|letter)-|^file-(word|excel|powerpoint)|^dev-to$")
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
    """Names of the same words are one thing, called as most sets call it; a tie goes to the first set's order. Where
    one set has two of them ("arrow left top", "arrow top left") they mean different things and stay apart."""
    same: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in named:
        same[tuple(sorted(name.split("-")))].append(name)
    merged = {}
    for names in same.values():
        sets = {n: {d.set for d in named[n]} for n in names}
        if sum(map(len, sets.values())) > len(set.union(*sets.values())):
            merged.update({n.replace("-", " "): named[n] for n in names})
        else:
            best = max(names, key=lambda n: len(sets[n]))
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
        drawings: list[Drawing] = []
        masks: list[np.ndarray] = []
        for drawing in merged[name]:
            try:
                mask = icon_mask(drawing.font, drawing.code, SIZE).reshape(-1).astype(np.int16)
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
