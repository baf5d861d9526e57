"""Thirty prompts a task, written for these tests: like the tasks' data, and in none of it."""

BANKING = """\
My new card has not turned up and it has been two weeks
Somebody took my phone, is my account safe?
Why was I charged for taking cash out abroad?
How do I switch on the card I got in the mail?
The exchange rate you applied to my holiday purchase looks wrong
Is there a way to top up with a cheque?
I typed my PIN wrong three times and now nothing works
A payment I don't recognise appeared on my statement this morning
Can my daughter who is 15 open an account?
My transfer to my landlord still says pending
Please tell me which currencies I can hold
I would like to change the name on my account after my wedding
The machine kept my card
How much does an international transfer cost?
My salary has not arrived although my employer sent it
Where can I find the code to unblock my card?
I want my money back for a jacket that I returned
Do you deliver cards to Portugal?
Contactless stopped working at the supermarket
Why do I have to prove who I am?
I was billed twice for the same taxi
How long until a bank transfer shows up from Germany?
I need a second card for my husband
Close my account, I am leaving for another bank
The top up I made with my card was reverted
What is the maximum that I can put in with Google Pay?
I moved house, how do I change my address?
Can I get a disposable virtual card for one purchase?
An extra pound was taken when I paid at a restaurant
Can I pick my own PIN?""".splitlines()

BASH = """\
find big files
list every directory under /srv that is empty
print the last 20 lines of /var/log/syslog
count how many python files are below the current directory
delete all files ending in .bak in my home directory
show disk usage of each folder in /opt sorted by size
search for the word "timeout" in all .conf files below /etc
create the folder tree a/b/c
find files changed in the last 2 days
copy all png files from pics to backup
show lines 5 to 10 of report.txt
replace foo with bar in every txt file
print the third column of data.csv
find all symbolic links in /usr/lib
compress the folder logs into logs.tar.gz
make script.sh executable for everyone
show which processes use port 8080
sort names.txt and remove duplicate lines
display the current date in ISO format
find files owned by user alice
count the words in essay.md
list files in long format, newest first
rename old.txt to new.txt
print the number of unique lines in access.log
find all files larger than 100 megabytes in /var
show the first line of every .log file here
print all environment variables that contain PATH
kill the process with id 4242
download nothing, just print hello
find directories named node_modules and remove them""".splitlines()

MATH = """\
Tom had 14 marbles and gave 5 to Ann. How many marbles does Tom have now?
A box holds 12 eggs. How many eggs are in 7 boxes?
Sara read 20 pages on Monday and 35 on Tuesday. How many pages did she read in total?
There are 48 pupils in 6 equal groups. How many pupils are in each group?
A shirt costs 25 dollars and trousers cost 40 dollars. How much do both cost?
Ben ran 3 miles on each of 5 days. How far did he run?
A farmer has 90 sheep and sells 36 of them. How many are left?
Lena baked 4 trays of 9 cookies and ate 3. How many cookies remain?
A train travels 60 miles in an hour. How far does it travel in 4 hours?
Paul has 7 times as many cards as Tim, who has 8. How many does Paul have?
120 chairs stand in rows of 15. How many rows are there?
Mia saved 18 dollars and then earned 27 more. She spent 10. How much has she?
A rope of 50 feet is cut into 10 equal pieces. How long is each piece?
There were 33 birds on a tree and 12 flew away, then 5 came. How many are there?
Each of 11 children got 6 sweets. How many sweets were given out?
A book has 300 pages. Joe read 125. How many pages are left to read?
Nina buys 3 pens at 2 dollars and 1 bag at 15 dollars. What does she pay?
A tank holds 80 liters and 26 liters are used. How much remains?
How many wheels do 9 cars have if each has 4?
Two friends share 64 stickers equally. How many does each get?
Omar is 9 years old and his father is 4 times as old. How old is his father?
The bakery sold 45 rolls in the morning and 38 in the afternoon. How many in all?
A garden has 8 rows with 14 plants each. How many plants are there?
Kate had 100 dollars, spent 42 on shoes and 23 on a hat. How much is left?
A pizza is cut into 8 slices. How many slices do 6 pizzas give?
Sam picked 56 apples and put them in bags of 7. How many bags did he fill?
There are 5 shelves with 30 books each, and 20 books on the floor. How many books?
A plumber charges 45 dollars an hour. How much for 6 hours?
Ella had some beads, found 9 more and now has 31. How many had she at first?
A class of 28 has 13 boys. How many girls are in the class?""".splitlines()

PROMPTS = {"banking": BANKING, "bash": BASH, "math": MATH}
