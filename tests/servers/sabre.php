<?php
// A share served by sabre/dav 1.8 (Debian: php-sabre-dav), as a router of PHP's built-in web server.
// The settings come from the file that the environment names: see sabre.py.
error_reporting(E_ALL & ~E_DEPRECATED);
ini_set('display_errors', '0');
require 'Sabre/autoload.php';

$settings = json_decode(file_get_contents(getenv('SABRE_SETTINGS')), true);

register_shutdown_function(function () use ($settings) {
    $line = $_SERVER['REQUEST_METHOD'] . ' ' . $_SERVER['REQUEST_URI'] . ' ' . http_response_code() . "\n";
    file_put_contents($settings['log'], $line, FILE_APPEND | LOCK_EX);
});

class OneUser extends Sabre\DAV\Auth\Backend\AbstractBasic
{
    public function __construct(private array $settings)
    {
    }

    protected function validateUserPass($user, $password)
    {
        return $user === $this->settings['user'] && $password === $this->settings['password'];
    }
}

$server = new Sabre\DAV\Server(new Sabre\DAV\FSExt\Directory($settings['root']));
$server->setBaseUri($settings['prefix']);
$server->addPlugin(new Sabre\DAV\Auth\Plugin(new OneUser($settings), 'nbmountd'));
$server->exec();
return true;
