"""The languages of the embedded world, one file each."""

from vlmoe.data.world.languages.base import CATEGORIES, DIGIT_WORDS, Language
from vlmoe.data.world.languages.english import ENGLISH
from vlmoe.data.world.languages.french import FRENCH
from vlmoe.data.world.languages.german import GERMAN
from vlmoe.data.world.languages.spanish import SPANISH

LANGUAGES = {language.code: language for language in (ENGLISH, GERMAN, FRENCH, SPANISH)}

__all__ = ["CATEGORIES", "DIGIT_WORDS", "LANGUAGES", "Language"]
