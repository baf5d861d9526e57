"""What the demo asks."""

PROMPTS = {
    "banking": [
        "I still have not received my new card, when will it arrive?",
        "Why was I charged a fee for taking cash out of an ATM?",
        "My phone was stolen this morning, what should I do about the app?",
        "The exchange rate for my transfer to Japan looks wrong.",
    ],
    "bash": [
        "find all files bigger than 100 MB under /var",
        "count the lines of all Python files in the current directory",
        "show the ten largest directories below /home",
        "delete empty directories in /tmp",
    ],
    "math": [
        "A baker made 24 muffins and sold 3 boxes of 6. How many are left?",
        "Lena has 5 bags with 8 marbles each. How many marbles does she have in all?",
        "Tom had 50 dollars. He bought 2 books for 12 dollars each. How much money does he have now?",
        "48 children are split evenly into 6 teams. How many children are in each team?",
    ],
}
