"""What a message must tell, whatever sentence tells it."""


def assert_tells(message: str, facts: str) -> None:
    """In one line and this order: the field, its value, the limit, what names the remedy; " … " stands between them."""
    assert "\n" not in message.strip(), message
    place = 0
    for fact in facts.split(" … "):
        found = message.find(fact, place)
        assert found >= 0, f"{fact!r} is not told (in this order): {message}"
        place = found + len(fact)
