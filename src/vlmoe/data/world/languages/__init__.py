"""The languages of the embedded world, one file each."""

from vlmoe.config import RecipeError
from vlmoe.data.world.languages.base import CATEGORIES, DIGIT_WORDS, Language
from vlmoe.data.world.languages.english import ENGLISH
from vlmoe.data.world.languages.french import FRENCH
from vlmoe.data.world.languages.german import GERMAN
from vlmoe.data.world.languages.spanish import SPANISH

LANGUAGES = {language.code: language for language in (ENGLISH, GERMAN, FRENCH, SPANISH)}

__all__ = ["CATEGORIES", "DIGIT_WORDS", "LANGUAGES", "Language", "languages_of"]


def languages_of(codes: list[str]) -> list[Language]:
    """The languages of a recipe, each once. Raises RecipeError for none or an unknown code."""
    unknown = [code for code in codes if code not in LANGUAGES]
    if unknown or not codes:
        wanted = f"at least one of {', '.join(LANGUAGES)}"
        raise RecipeError(f"key 'data.world.languages' got {unknown or codes!r}, wanted {wanted}")
    return [LANGUAGES[code] for code in dict.fromkeys(codes)]
