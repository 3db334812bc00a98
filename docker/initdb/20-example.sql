-- Something to look at: one table, indexed by the service `index`.
CREATE TABLE messages (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    author text NOT NULL,
    body text NOT NULL,
    sent_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO messages (author, body) VALUES
    ('Ada', 'The engine weaves patterns as the loom weaves flowers.'),
    ('Grace', 'It is easier to ask forgiveness than to get permission.');
