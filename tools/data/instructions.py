"""Instructions that stand in front of a customer's question to a bank, of about 40, 100 and 230 tokens (WordPiece)."""

_SHORT = (
    "Represent the following question of a bank's customer so that it can be matched with the intent behind it; "
    "questions that one employee of the bank would answer in the same way should lie close together. Question:"
)
_MIDDLE = (
    "You are given one message that a customer typed into the chat window of a bank that works only through an app. "
    "The customer may ask about cards, transfers, top-ups, fees, exchange rates, cash machines, identity checks or "
    "the account itself. Spelling mistakes and missing punctuation carry no meaning. Represent the message so that "
    "messages with the same intent lie close together and messages with different intents lie far apart, even where "
    "they use the same words. Do not let the length or the tone of the message count. Message:"
)
_LONG = (
    "You are given one message that a customer typed into the chat window of a bank that works only through an app. "
    "The bank issues physical and virtual cards, which can be ordered, activated, linked, frozen and replaced in "
    "the app. Accounts are topped up by bank transfer, by another card, by cheque, in cash or by a phone's wallet; "
    "a top-up may be pending, may fail, may be charged for, or may be reversed. Transfers can be pending, declined, "
    "cancelled or sent to the wrong person, and their arrival depends on the country of the receiver. Payments by "
    "card may appear twice, may be unknown to the customer, may be refunded, or may be charged at an exchange rate "
    "that the customer did not expect. Cash machines may keep the card, pay out too little, or decline the request. "
    "Before some of these services are open, the customer proves who he is and where the money came from. Represent "
    "the message so that messages with the same intent lie close together and messages with different intents lie "
    "far apart, even where they use the same words. Message:"
)
INSTRUCTIONS = {40: _SHORT, 100: _MIDDLE, 230: _LONG}  # by their tokens
