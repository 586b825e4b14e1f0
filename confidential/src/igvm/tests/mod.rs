mod malformed;
mod oracle;
